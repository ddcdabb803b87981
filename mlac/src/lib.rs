//! mlac
