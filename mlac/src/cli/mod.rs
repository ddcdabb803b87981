//! The command line: arguments, units, commands.

pub mod args;
pub mod commands;
pub mod summary;
pub mod units;
