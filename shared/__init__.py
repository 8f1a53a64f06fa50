"""The patch model that both backends share: plans, targets, sites, patch sets; and ELF files, coverage, libraries."""
