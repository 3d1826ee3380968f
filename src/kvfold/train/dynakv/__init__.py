"""Calibration and training of DynaKV."""
