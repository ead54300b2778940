"""What both ends of the wire share: the contract's stubs, its errors, and how to connect."""
