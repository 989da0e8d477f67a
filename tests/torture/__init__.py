"""Fault injection: kills, full disks, corrupted and malicious files, mismatched inputs."""
