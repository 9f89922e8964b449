//! Optimisers, schedules, clipping and weight averaging.
