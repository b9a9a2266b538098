"""The commands, by what they are about; each validates first and imports what is heavy afterwards."""
