"""Processes: who runs where, joining `torch.distributed`, starting ranks together and ending them together."""
