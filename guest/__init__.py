"""Guest assets: kernels, initramfs images and disks for tests, benches and `make run`, built from Debian packages."""
