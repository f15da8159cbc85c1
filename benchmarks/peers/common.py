Batch=Peer=main=None
