"""What the program runs on: processes, devices, random streams, files."""
