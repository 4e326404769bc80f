"""What differs between processors, as pure functions over numbers and bytes: one folder an architecture."""
