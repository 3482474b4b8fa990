//! What tests across Deed's crates share.

pub mod graph;
pub mod pair;
pub mod real;
pub mod tell;
#[cfg(deed_shuttle)]
pub mod threads;

/// The calls of the specification that the core serves, by name: all but those by which the host keeps its own books.
pub fn calls_of_the_core() -> impl Iterator<Item = &'static str> {
    const BOOKS: [&str; 4] = ["host maps", "host unmaps", "host holds", "host releases"];
    spec::call::CALLS.into_iter().filter(|call| !BOOKS.contains(call))
}

/// Prints what a long test has reached, past the runner, which would show what a test prints only if it fails.
pub fn tell_reached(what: std::fmt::Arguments<'_>) {
    use std::io::Write;
    // Without a terminal to print to, the test goes on.
    let _ = writeln!(std::io::stderr(), "{what}");
}
