"""What is installed and what the machine has in, what is wrong and the one command that mends it out."""
