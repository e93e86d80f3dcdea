//! What holds of a ring of either layout, as its driver sees it.

mod kills;
mod regions;
