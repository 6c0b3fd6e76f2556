"""`minivllm train-draft`: trains a draft on what the target model itself generates."""
