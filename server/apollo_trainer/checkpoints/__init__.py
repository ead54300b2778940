"""What reaches the disk: durable writes, the Apollo state, the model directory."""
