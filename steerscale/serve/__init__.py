"""A language model behind OpenAI's HTTP interface, with steering recipes to choose from in each request (docs/serve.md)."""
