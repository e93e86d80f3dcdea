//! A remote disk: the host side of NVMe over TCP.
//!
//! One *namespace* is reached by one or several *paths*, an address each. A path has a thread of its own
//! (`controller`): it connects, keeps the association alive, listens to events, and connects again when it was
//! lost. All that blocks is done there. The workers do nothing but I/O: each has one queue, that is one TCP
//! connection, for each path, which the path's thread hands to it ready for use ([`link`]).
//!
//! Sections cited are those of the NVM Express TCP Transport Specification 1.0 ("TCP"), of the Base Specification
//! 2.0 ("Base") and of the NVM Command Set Specification 1.0 ("NVM").

pub mod link;
pub mod machine;
pub mod spec;
