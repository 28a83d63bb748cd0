"""Large values between tasks."""
