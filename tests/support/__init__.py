"""What tests share: cases, oracles, strategies and batteries."""
