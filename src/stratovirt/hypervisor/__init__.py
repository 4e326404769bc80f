"""What runs the guest: KVM. No policy lives here."""
