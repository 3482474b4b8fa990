//! What tests across Deed's crates share.

pub mod graph;
pub mod pair;
pub mod real;
#[cfg(deed_shuttle)]
pub mod threads;

/// Prints what a long test has reached, past the runner, which would show what a test prints only if it fails.
pub fn tell_reached(what: std::fmt::Arguments<'_>) {
    use std::io::Write;
    // Without a terminal to print to, the test goes on.
    let _ = writeln!(std::io::stderr(), "{what}");
}
