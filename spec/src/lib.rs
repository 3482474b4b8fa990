//! The rules of memory ownership as a pure function: from a state and a call to an outcome and a state.
//!
//! Written from `docs/memory-ownership.md` and `docs/hypercalls.md`, not from the code: no tables, no locks, no
//! caches. The tests of `deed-tests` play it in lockstep with the real core; [`explore`] visits every state of
//! small worlds.
//!
//! | module | what it holds |
//! |---|---|
//! | [`state`] | what there is: pages, VMs, what each side's books say |
//! | [`call`] | what can be asked, and what can be answered |
//! | [`step`](mod@step) | the rules: what refuses and what changes; `host`, `guest`, `access`: one function a call |
//! | [`invariants`] | what always holds |
//! | `tell` | calls and outcomes in words |
//! | [`chooser`] | random calls for tests to play |
//! | [`explore`] | every state of a small world, and the story of the shortest way to a broken one |
//! | `names` | what is the same but for the names of pages and VMs |
//! | [`worlds`] | the small worlds, and the outcomes that they come to |

#![cfg_attr(not(any(test, feature = "explore")), no_std)]
#![forbid(unsafe_code)]

mod access;
pub mod call;
pub mod chooser;
#[cfg(any(test, feature = "explore"))]
pub mod explore;
mod guest;
mod host;
pub mod invariants;
#[cfg(any(test, feature = "explore"))]
mod names;
pub mod state;
pub mod step;
mod tell;
#[cfg(any(test, feature = "explore"))]
pub mod worlds;

pub use access::{is_device, is_honest};
pub use call::{Call, Outcome};
pub use state::{Run, State};
pub use step::{World, step, step_in_place};

#[cfg(test)]
mod tests;
