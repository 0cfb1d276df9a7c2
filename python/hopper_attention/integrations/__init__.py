"""Adapters to other libraries' attention calls; each imports its library only when it is used."""
