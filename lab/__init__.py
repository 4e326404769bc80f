"""The emulated hosts in which real guests run on machines whose own KVM cannot run them."""
