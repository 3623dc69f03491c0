"""The one training loop; knows no model."""
