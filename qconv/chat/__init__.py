"""Chats as text. A chat template is a program of somebody else's: it runs apart, bounded in time and memory."""
