"""What every use of a vLLM engine needs, without vLLM itself: its environment in, the end of its processes out."""
