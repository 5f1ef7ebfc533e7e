"""Generation: decoding rules, draws and the block loop."""
