"""What makes other libraries take compressed models for what they are."""
