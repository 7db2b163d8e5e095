"""The main job: what ``torchrun examples/pretrain_byte_kd.sh`` runs, from the command line to the closing table."""
