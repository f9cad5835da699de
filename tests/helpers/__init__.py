"""What several test modules need; a test module never imports another one."""
