"""Linux KVM, one module per ioctl family: `system` (/dev/kvm), `vm`, `vcpu`, and `registers` for the structures they carry."""
