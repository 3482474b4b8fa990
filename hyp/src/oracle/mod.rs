//! The oracle: the specification, run inside the hypervisor beside every transition.
//!
//! | file | what it does |
//! |---|---|
//! | `window` | which pages a transition is about, and their numbers in the specification's world |
//! | `abstraction` | what the real tables say of such a page, in the specification's words |
//! | `check` | looks before, asks the specification, looks after, compares |
//! | `report` | tells a difference in calls and pages, and stops the machine |
//!
//! It looks only at components whose locks the transition holds, so what it sees before is what the transition
//! starts from, and what it sees after is what the transition leaves. It changes nothing. Its own state, two
//! states of the specification, is too large for a stack and stands behind a lock that is taken last and held
//! until the transition is over.
//!
//! What it does not see: TLBs and caches, registers, calls that are refused before they come to a transition, and
//! pages that are farther than one from those of the call.
//!
//! The oracle may panic: it stops the machine at a disagreement, so also at a mistake of its own.

#![forbid(unsafe_code)]
#![expect(
    clippy::indexing_slicing,
    clippy::arithmetic_side_effects,
    reason = "a mistake of the oracle stops the machine, as a disagreement does"
)]

mod abstraction;
mod check;
mod report;
mod window;

#[cfg(test)]
mod tests;

pub(crate) use check::Watch;
pub use check::{Cost, cost};
