"""Bytes to files and back: token rows and payloads in, durable Arrow shards and a sealed manifest out."""
