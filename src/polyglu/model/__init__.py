"""The model: config, architecture, routing, attention, files, generation."""
