/* The least that a monitor can do for an exit: KVM_RUN, look at the reason, again. Prints nanoseconds for each exit. */
#include <fcntl.h>
#include <linux/kvm.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <time.h>

static void fail(const char *what)
{
	perror(what);
	exit(1);
}

int main(int argc, char **argv)
{
	uint32_t count = argc > 1 ? (uint32_t)atol(argv[1]) : 20000;
	/* mov ecx, count; out f4, al; dec ecx; jnz; hlt: 16-bit code */
	uint8_t code[] = {0x66, 0xb9, 0, 0, 0, 0, 0xe6, 0xf4, 0x66, 0x49, 0x75, 0xfa, 0xf4};
	int kvm = open("/dev/kvm", O_RDWR), vm, vcpu;
	uint8_t *ram = mmap(NULL, 0x10000, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	struct kvm_userspace_memory_region region = {.memory_size = 0x10000, .userspace_addr = (uintptr_t)ram};
	struct kvm_sregs sregs;
	struct kvm_regs regs = {.rip = 0x1000, .rflags = 2};
	struct timespec begin, end;
	uint32_t exits = 0;
	struct kvm_run *run;

	memcpy(code + 2, &count, 4);
	memcpy(ram + 0x1000, code, sizeof code);
	if (kvm < 0 || (vm = ioctl(kvm, KVM_CREATE_VM, 0)) < 0 || ioctl(vm, KVM_SET_USER_MEMORY_REGION, &region) < 0)
		fail("virtual machine");
	/* with interrupt chips, as any machine has: they cost each exit a little */
	if (ioctl(vm, KVM_CREATE_IRQCHIP, 0) < 0 || (vcpu = ioctl(vm, KVM_CREATE_VCPU, 0)) < 0)
		fail("vCPU");
	run = mmap(NULL, ioctl(kvm, KVM_GET_VCPU_MMAP_SIZE, 0), PROT_READ | PROT_WRITE, MAP_SHARED, vcpu, 0);
	ioctl(vcpu, KVM_GET_SREGS, &sregs);
	sregs.cs.base = sregs.cs.selector = 0;
	if (ioctl(vcpu, KVM_SET_SREGS, &sregs) < 0 || ioctl(vcpu, KVM_SET_REGS, &regs) < 0)
		fail("registers");
	clock_gettime(CLOCK_MONOTONIC, &begin);
	while (exits < count) {
		if (ioctl(vcpu, KVM_RUN, 0) < 0)
			fail("KVM_RUN");
		if (run->exit_reason != KVM_EXIT_IO) {
			fprintf(stderr, "exit reason %u\n", run->exit_reason);
			return 1;
		}
		exits++;
	}
	clock_gettime(CLOCK_MONOTONIC, &end);
	printf("%.1f\n", ((end.tv_sec - begin.tv_sec) * 1e9 + (end.tv_nsec - begin.tv_nsec)) / count);
	return 0;
}
