# The handler of SIGSYS: the kernel runs it on the thread whose system call a filter has refused. It writes one line of log
# and lets the process die of SIGSYS. It calls nobody, allocates nothing and takes no lock, so it works whatever the thread
# was doing, with or without the interpreter's lock. It never returns.
#
#   2026-03-01T09:30:12.123456789: [4711][4713][seccomp]:ERROR: system call execve (59) is not allowed on a vCPU thread;
#   arguments 0x7f0000001000, 0x0, 0x0; the process ends
#
# Assembled by sandbox/generate.py, kept as bytes in sandbox/tables_x86_64.py. DATA is where sandbox/kernel.py has put:
#
#   0    u32  descriptor of the log
#   4    u32  how many names follow
#   8    four names of kinds of threads, of 24 bytes, padded with zeroes
#   104  names of system calls by number, each with a zero behind it
#
# A filter's SECCOMP_RET_DATA arrives as si_errno: the kind of the thread, plus 16 when the call would be allowed with
# other arguments.
#
# Entry: rsi siginfo_t (4 si_errno, 24 si_syscall), rdx ucontext_t (104 rdi, 112 rsi, 136 rdx of the thread).
# Registers: r12 siginfo_t, r13 ucontext_t, r15 DATA, r14 scratch of 1 KiB on the stack: a timespec, a pollfd, 64 the line.

        .intel_syntax noprefix
        .text
handler:
        mov     r12, rsi
        mov     r13, rdx
        movabs  r15, 0x7469767472617473         # DATA: "startvit", patched
        sub     rsp, 1024
        mov     r14, rsp

        mov     eax, 228                        # clock_gettime(CLOCK_REALTIME, scratch)
        xor     edi, edi
        mov     rsi, r14
        syscall
        lea     rdi, [r14 + 64]                 # from here on rdi is where the next letter goes

        # The date of a day, counted from 1 March of the year 0: every 400 years have 146097 days, and the months from March
        # on have 153 days in each five.
        mov     rax, [r14]
        mov     ecx, 86400
        xor     edx, edx
        div     rcx
        mov     r10, rdx                        # seconds of the day
        add     rax, 719468                     # days since 1 March 0
        mov     ecx, 146097
        xor     edx, edx
        div     rcx
        imul    rbx, rax, 400                   # years of whole eras
        mov     esi, edx                        # day of the era
        mov     eax, esi                        # year of the era = (day - day/1460 + day/36524 - day/146096) / 365
        xor     edx, edx
        mov     ecx, 1460
        div     ecx
        mov     r11d, esi
        sub     r11d, eax
        mov     eax, esi
        xor     edx, edx
        mov     ecx, 36524
        div     ecx
        add     r11d, eax
        mov     eax, esi
        xor     edx, edx
        mov     ecx, 146096
        div     ecx
        sub     r11d, eax
        mov     eax, r11d
        xor     edx, edx
        mov     ecx, 365
        div     ecx
        add     rbx, rax                        # the year, if it began in March
        mov     r11d, eax
        imul    r8d, eax, 365                   # day of the year = day - (365*year + year/4 - year/100)
        sub     esi, r8d
        shr     eax, 2
        sub     esi, eax
        mov     eax, r11d
        xor     edx, edx
        mov     ecx, 100
        div     ecx
        add     esi, eax
        imul    eax, esi, 5                     # month from March = (5*day + 2) / 153
        add     eax, 2
        xor     edx, edx
        mov     ecx, 153
        div     ecx
        mov     r11d, eax
        imul    eax, eax, 153                   # day of the month = day - (153*month + 2)/5 + 1
        add     eax, 2
        xor     edx, edx
        mov     ecx, 5
        div     ecx
        sub     esi, eax
        inc     esi
        add     r11d, 3
        cmp     r11d, 12
        jbe     1f
        sub     r11d, 12
        inc     rbx
1:      mov     rax, rbx
        mov     r8d, 4
        call    decimal
        mov     al, '-'
        stosb
        mov     eax, r11d
        call    two
        mov     al, '-'
        stosb
        mov     eax, esi
        call    two
        mov     al, 'T'
        stosb
        mov     rax, r10
        xor     edx, edx
        mov     ecx, 3600
        div     ecx
        mov     r10d, edx
        call    two
        mov     al, ':'
        stosb
        mov     eax, r10d
        xor     edx, edx
        mov     ecx, 60
        div     ecx
        mov     r10d, edx
        call    two
        mov     al, ':'
        stosb
        mov     eax, r10d
        call    two
        mov     al, '.'
        stosb
        mov     rax, [r14 + 8]
        mov     r8d, 9
        call    decimal

        lea     rsi, [rip + open]               # process and thread
        call    text
        mov     rbx, rdi
        mov     eax, 39                         # getpid
        syscall
        mov     rdi, rbx
        call    plain
        lea     rsi, [rip + between]
        call    text
        mov     rbx, rdi
        mov     eax, 186                        # gettid
        syscall
        mov     rdi, rbx
        call    plain
        lea     rsi, [rip + what]
        call    text

        mov     ebx, [r12 + 24]                 # the call: its name if there is one, and its number
        cmp     ebx, [r15 + 4]
        jae     2f
        lea     rsi, [r15 + 104]
        mov     ecx, ebx
        jrcxz   11f
9:      lodsb                                   # one name further
        test    al, al
        jnz     9b
        loop    9b
11:     cmp     byte ptr [rsi], 0
        je      2f
        call    text
        mov     al, ' '
        stosb
2:      mov     al, '('
        stosb
        mov     eax, ebx
        call    plain
        lea     rsi, [rip + refused]
        test    byte ptr [r12 + 4], 16
        jz      3f
        lea     rsi, [rip + arguments]
3:      call    text
        mov     esi, [r12 + 4]
        and     esi, 3
        imul    esi, esi, 24
        lea     rsi, [r15 + rsi + 8]
        call    text
        lea     rsi, [rip + values]
        call    text
        mov     rax, [r13 + 104]
        call    hex
        lea     rsi, [rip + comma]
        call    text
        mov     rax, [r13 + 112]
        call    hex
        lea     rsi, [rip + comma]
        call    text
        mov     rax, [r13 + 136]
        call    hex
        lea     rsi, [rip + end]
        call    text

        mov     rbx, rdi                        # poll({log, POLLOUT}, 1, 100 ms): a reader that is stuck costs the line
        mov     eax, [r15]
        mov     [r14 + 16], eax
        mov     dword ptr [r14 + 20], 4
        mov     eax, 7
        lea     rdi, [r14 + 16]
        mov     esi, 1
        mov     edx, 100
        syscall
        cmp     eax, 1
        jne     4f
        mov     eax, 1                          # write(log, line, length)
        mov     edi, [r15]
        lea     rsi, [r14 + 64]
        mov     rdx, rbx
        sub     rdx, rsi
        syscall

        # A call that no filter allows. SIGSYS is blocked in here, so the kernel ends the process with it.
4:      mov     eax, 0x3ffffffe
        syscall
leave:  mov     eax, 231                        # exit_group(128 + SIGSYS), if there is no filter on this thread
        mov     edi, 159
        syscall
        ud2

two:    mov     r8d, 2
        jmp     decimal
plain:  mov     r8d, 1
decimal:                                        # rax in at least r8d digits
        mov     r9d, 10
number: xor     ecx, ecx
5:      xor     edx, edx
        div     r9
        push    rdx
        inc     ecx
        test    rax, rax
        jnz     5b
        cmp     ecx, r8d
        jb      5b
6:      pop     rax
        add     al, '0'
        cmp     al, '9'
        jbe     7f
        add     al, 'a' - '0' - 10
7:      stosb
        dec     ecx
        jnz     6b
        ret

hex:    mov     r9, rax
        mov     ax, 0x7830                      # "0x"
        stosw
        mov     rax, r9
        mov     r9d, 16
        mov     r8d, 1
        jmp     number

text:   lodsb                                   # letters up to a zero
        test    al, al
        jz      8f
        stosb
        jmp     text
8:      ret

open:   .asciz  ": ["
between:.asciz  "]["
what:   .asciz  "][seccomp]:ERROR: system call "
refused:.asciz  ") is not allowed on "
arguments:
        .asciz  ") is not allowed with these arguments on "
values: .asciz  "; arguments "
comma:  .asciz  ", "
end:    .asciz  "; the process ends\n"
