"""The stages: which parameters train, which parts run, which losses. One small file each."""
