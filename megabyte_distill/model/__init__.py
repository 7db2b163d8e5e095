"""The student's parts: byte encoder, router, chunking, backbone, byte decoder."""
