"""The patch model both backends share: plans, targets, sites, resolution, patch sets, ELF and blocks."""
