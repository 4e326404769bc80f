"""What an arm64 board has: processors and GIC, the boot, PL011 and PL031."""
