"""What the program runs on: devices, processes, random streams, files."""
