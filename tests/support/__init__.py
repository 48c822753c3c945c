"""The modules that tests share: cases, oracles, strategies and batteries."""
