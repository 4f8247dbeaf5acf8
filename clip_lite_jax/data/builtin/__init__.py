"""The built-in emoji pairs; see NOTICE.md for their makers and licences."""
