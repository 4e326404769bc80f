"""What an x86_64 board has: processors and interrupt chips, the boot, the devices of a PC."""
