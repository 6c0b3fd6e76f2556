"""What is measured, without who is measured: workloads and statistics. Standard library only."""
