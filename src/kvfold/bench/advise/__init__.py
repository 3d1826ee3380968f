"""Which plan to take for one model: bytes from its config.json, loss from a short check, and a choice by a rule."""
