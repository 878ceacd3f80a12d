"""The commands of ``payfold``, by what they are about."""
