"""The LightningModule, EMA, checkpoint writing, trainer and callbacks."""
