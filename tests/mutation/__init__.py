"""Mutation testing of the core: does a test fail where the code is changed?"""
