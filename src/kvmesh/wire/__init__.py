"""Between protobuf and core: conversion, validation, and the one error catalog."""
