"""Fine-tuning and chat over HTTP, by OpenAI's interface."""
