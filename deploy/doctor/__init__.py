"""The checks of `payfold doctor`: first all is read, within a time, then each check judges what was read."""
